"""Several adapters over one base: their folder, what chooses among them, and what watches the choice."""
