"""What people look at: figures, tables, the paper, the report, the kit."""
