"""Image quality without a reference: features of two experts, a linear regressor on opinion scores, a score for any picture."""
