"""Structured PSD operators on m x n matrices."""
