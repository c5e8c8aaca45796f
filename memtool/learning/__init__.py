"""How a frozen model learns: what is trained, under which head, and how that is measured."""
