// The process that holds a pod's namespaces.
module churn.test/pause

go 1.26.0
