"""The pages of the service, over its public API alone: files that the API process serves as they are."""
