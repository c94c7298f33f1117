"""The Serve application, the replicas and their handles, and the server of one machine around them."""
