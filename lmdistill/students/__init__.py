"""Students: from random, or grown from a teacher."""
