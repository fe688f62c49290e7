"""From a path to a model that is ready: prepared or refused, built, loaded, on one rank or many."""
