"""The command line of memtool: parse, call the library, render. No tensors here."""
