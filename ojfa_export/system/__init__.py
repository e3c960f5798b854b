"""What knows nothing of models: files, paths, pipes, digests, progress, pages."""
