"""What the operating system offers: files replaced in one step, memory given back, threads side by side."""
