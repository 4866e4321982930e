"""Why a model predicts what it predicts: attributions, what its layers think, training examples like it."""
