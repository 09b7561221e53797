"""What every other package uses: checks, layouts, collectives, operators by name. It imports none of them."""
