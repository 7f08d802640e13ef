"""Classes and numbers for texts and images."""
