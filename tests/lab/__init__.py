"""A package, so that its test files may have the names of other rooms' test files."""
