"""Laws in several variables: parameters, data and history length together."""
