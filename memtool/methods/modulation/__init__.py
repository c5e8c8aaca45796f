"""Modulation: whole adapters, recalled from an associative memory by a part of themselves."""
