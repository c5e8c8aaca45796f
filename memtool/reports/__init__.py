"""Tables for the terminal, and the self-contained HTML report of a record."""
