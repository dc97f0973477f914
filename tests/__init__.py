"""The tests; a package, so that tests and checks can import each other by name."""
