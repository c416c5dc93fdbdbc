"""What everything stands on: files, the model hub, processes, signals. Knows nothing of models, data or methods."""
