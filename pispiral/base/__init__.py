"""What every wing stands on: error messages, files, the session's deadline, timings, registries and plugins."""
