"""Speed, size and quality, always beside a peer or a limit measured in the same run.

`python -m benchmarks` lists the benchmarks; each is one module here with
`run(repeats: int) -> dict` whose first docstring line says what it measures.
"""
