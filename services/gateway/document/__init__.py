"""The OpenAPI document, put together from the routes, the bodies they read and the objects they answer."""
