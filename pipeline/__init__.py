"""The lorc pipeline: steps, Ray, evaluation, MLflow. The only package that knows Ray, MLflow and Parquet."""
