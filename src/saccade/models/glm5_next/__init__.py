"""GLM-5.3-Flash (`glm5_next`): recurrent layers among sparse ones, and four residual streams. Start at config.py."""
