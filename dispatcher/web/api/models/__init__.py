"""What the API takes and gives. These models validate, and the OpenAPI document is made from them: what isn't here isn't there.

Bodies and queries refuse what they don't know. Answers are cut to their model: a field that nobody listed, such as a
secret, can't slip out.
"""
