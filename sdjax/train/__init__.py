"""Training: losses (pure functions), one step (a pure function of a state), data, and the loop that runs them."""
