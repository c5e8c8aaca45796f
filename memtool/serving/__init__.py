"""A memory as a service: requests over HTTP, answered batch by batch by one of its versions."""
