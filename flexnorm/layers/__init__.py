"""The layer `Norm`, and the state that layers share."""
