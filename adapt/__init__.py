"""Experts and their mixture: singular values, REINFORCE on verifiable rewards, a search over mixture and structure."""
