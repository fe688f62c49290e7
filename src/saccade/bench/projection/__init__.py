"""The indexer's projection in six arrangements, as an operation and inside the model."""
