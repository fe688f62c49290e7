"""Where each layer's indexer looked, shown: `saccade look` and the page of a server."""
