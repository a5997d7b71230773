"""Attribution: the loss and the bytes that quantizing each group of tensors accounts for."""
