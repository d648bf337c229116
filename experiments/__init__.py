"""Scripts that measure what the docs' tables show; each table names its script."""
