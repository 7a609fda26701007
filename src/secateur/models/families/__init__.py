"""One file a family; each defines `FAMILY`. They are found by being here: there is no list to edit."""
