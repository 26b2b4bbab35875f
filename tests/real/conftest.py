"""The modules beside these tests are found by name, as in tests/engine."""
