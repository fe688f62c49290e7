"""`saccade eval`: are the answers right, and what does the indexer's arithmetic change?"""
