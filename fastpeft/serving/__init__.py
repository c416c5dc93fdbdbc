"""Finished runs behind HTTP: `fastpeft serve`. What imports the extra `serve` is imported when a server starts."""
