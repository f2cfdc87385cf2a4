"""The harness: suites in, records and reports out."""
