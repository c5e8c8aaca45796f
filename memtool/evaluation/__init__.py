"""The accuracy matrix, the metrics that follow from it, and records of what was measured."""
