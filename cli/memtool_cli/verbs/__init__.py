"""The verbs, by theme; each module has a Typer `app`. Imported only when a verb is called."""
