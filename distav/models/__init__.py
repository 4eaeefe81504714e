"""Visual and audio towers, and the heads on top of them."""
