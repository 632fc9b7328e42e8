"""What `megalith inspect` shows, one module per view: each gives JSON-ready data and the lines of text made from them."""
