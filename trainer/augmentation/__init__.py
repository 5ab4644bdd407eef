"""What training does to images before it sees them: the released recipe, the strong parts, their
preview.
"""
