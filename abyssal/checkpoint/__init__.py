"""Files to model and back: official releases as they are, in bounded memory."""
