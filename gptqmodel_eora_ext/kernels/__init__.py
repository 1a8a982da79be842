"""y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias over packed weights, in one pass. Imports no host."""
