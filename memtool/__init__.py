"""memtool: adapters in a versioned associative memory."""

__version__ = "0.1.0"
