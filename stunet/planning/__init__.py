"""Plans files, model folders, and preprocessed data."""
