"""What is measured and kept: asking, records, duplicates, memory and time, streams, diagnostics."""
