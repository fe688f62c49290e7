"""`saccade compare`: is it the engine or the model? A server's log-probabilities against what the checkpoint says."""
