"""What binds an answer: calls typed by their tools, or JSON of a schema, as the text of a grammar."""
